"""FLORES-200 into English, in the languages of CALM's table 2."""
