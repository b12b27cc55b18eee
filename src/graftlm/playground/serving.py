"""Serve the page on one address, for as long as a context lasts."""

from collections.abc import Iterator
from contextlib import contextmanager

from graftlm.playground.page import STYLE, THEME, Page

MAX_FILE_SIZE = 1  # byte: the page takes no files


@contextmanager
def serve(page: Page, host: str, port: int) -> Iterator[str]:
    """Serve a page; its runs end with the context.

    Args:
        page: The page.
        host: The address to listen on.
        port: A free one.

    Yields:
        The page's address.
    """
    _, address, _ = page.blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
        max_file_size=MAX_FILE_SIZE,
        theme=THEME,
        css_paths=[STYLE],
    )
    try:
        yield address.rstrip("/")
    finally:
        page.playground.close()
        page.blocks.close(verbose=False)
