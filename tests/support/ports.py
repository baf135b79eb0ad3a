"""A TCP port for a server that binds it later, by its number."""

import contextlib
import socket


def reserved_port() -> int:
    """A port of 127.0.0.1 that the kernel gives to nobody else within the next minute.

    One that was only looked up and closed again may be another test's by the time that it is bound. A
    connection that was closed from this side holds it in TIME_WAIT, where only a server that names it (with
    SO_REUSEADDR, which servers set) can bind it.
    """
    with socket.socket() as listener, socket.socket() as client:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        client.connect(listener.getsockname())
        accepted, _ = listener.accept()
        with contextlib.closing(accepted):
            port: int = listener.getsockname()[1]
            return port
