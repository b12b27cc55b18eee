"""`graftlm playground`: a local web page on which the parts write side by side."""

import argparse
import ipaddress
import socket
import sys
import threading
import warnings

from graftlm.cli import options

PORTS = range(7860, 7960)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Folder, address and limits."""
    parser.usage = "graftlm playground FOLDER [options]"
    parser.add_argument("folder", metavar="FOLDER", help="a composed model")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="who can reach the page: this machine (default: 127.0.0.1), or all (0.0.0.0)",
    )
    parser.add_argument(
        "--port", type=int, metavar="N", help="by default the first free one from 7860"
    )
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    group = parser.add_argument_group("limits of a visitor")
    group.add_argument(
        "--max-characters", type=int, default=4000, metavar="N", help="of a prompt (default: 4000)"
    )
    group.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="of a text (default: 256)"
    )
    options.add_models(parser, required=False)
    options.add_loading(parser)


def run(args: argparse.Namespace) -> int:
    """Load the model, serve the page, and wait for Ctrl-C."""
    check_address(args.host, args.port)
    port = free_port(args.host, PORTS if args.port is None else range(args.port, args.port + 1))
    try:
        import gradio  # noqa: F401 (before the models are loaded, which may take minutes)
    except ImportError as exc:
        raise ImportError(
            "the playground needs the gradio package, which is missing; "
            "pip install 'graftlm[playground]'"
        ) from exc
    import torch

    from graftlm.cli.generate import load, load_tokenizer
    from graftlm.playground.page import Page
    from graftlm.playground.runs import Limits, Playground
    from graftlm.playground.serving import serve

    limits = Limits(max_characters=args.max_characters, max_new_tokens=args.max_new_tokens)
    model = load(args)
    if args.device_map is None and torch.cuda.is_available():
        model.to("cuda")
    playground = Playground(model, load_tokenizer(args, model), limits)
    if not is_loopback(args.host):
        warnings.warn(f"anyone who reaches {args.host} can use this page", stacklevel=2)
    with serve(Page(playground, title(args.folder)), args.host, port) as address:
        print(f"{args.folder} is at {address} (Ctrl-C ends it)", flush=True)
        if args.open:
            open_browser(address)
        wait_for_interrupt()
    print("the playground has ended")
    return 0


def title(folder: str) -> str:
    """What the page is called: the last part of the folder."""
    return folder.rstrip("/").rpartition("/")[2] or "playground"


def check_address(host: str, port: int | None) -> None:
    """Refuse what no page can be served at.

    Raises:
        ValueError: If there is no such port, or the host is an IPv6 address.
    """
    if port is not None and port not in range(1, 65536):
        raise ValueError(f"--port is {port}, but must be from 1 to 65535")
    if ":" in host:  # Gradio would fail after the models are loaded
        raise ValueError(
            f"--host is {host!r}, but must be a name or an IPv4 address, such as 127.0.0.1"
        )


def free_port(host: str, ports: range) -> int:
    """The first of these ports that nobody uses.

    Raises:
        ValueError: If none is free, or the host is not of this machine.
    """
    reason = ""
    for port in ports:
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind((host, port))
            except OSError as error:
                reason = error.strerror or str(error)
            else:
                return port
    raise ValueError(f"--host {host} has no free --port from {ports[0]} to {ports[-1]}: {reason}")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def open_browser(address: str) -> None:
    """Show the page; a machine without a browser says so."""
    import webbrowser

    if not webbrowser.open(address):
        print(f"graftlm: warning: found no browser; open {address}", file=sys.stderr)


def wait_for_interrupt() -> None:
    """Until Ctrl-C."""
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print()  # the terminal shows ^C
