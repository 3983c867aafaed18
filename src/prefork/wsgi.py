"""WSGI apps: what is decided about them in Python. _wsgi.pyx calls them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from prefork import _core, log
from prefork._native import Request
from prefork._wsgi import Dispatcher, template
from prefork.native import Desk, Hooks


@dataclass(frozen=True)
class Manners:
    """The options of a Server that only WSGI apps have."""

    root_path: str = ""
    header_map: str = "drop"
    multiprocess: bool = True


class WsgiDesk(Desk):
    """Serves a WSGI app; hooks and errors are those of native handlers."""

    def __init__(
        self,
        app: Any,
        core: _core.Loop,
        hooks: Hooks,
        logger: log.Logger,
        threads: int = 1,
        manners: Manners | None = None,
    ) -> None:
        self.manners = manners or Manners()
        super().__init__(app, core, hooks, logger, threads)

    def make_dispatcher(self, simple: bool) -> Dispatcher:
        dispatcher = Dispatcher(self.core, self.handler, self, simple)
        manners = self.manners
        environ = template(
            multithread=self.crew_size > 1,
            multiprocess=manners.multiprocess,
            errors=sys.stderr,
            software="prefork",
            root_path=manners.root_path,
            scheme=self.scheme,
        )
        dispatcher.configure(environ, manners.root_path, manners.header_map)
        return dispatcher

    def starts_early(self, request: Request) -> bool:
        """Only for a client that waits for 100 Continue: the app may not want it."""
        return request.expects_continue

    def start_early(self, request: Request) -> None:
        self.serve(request)


__all__ = ["Manners", "WsgiDesk"]
