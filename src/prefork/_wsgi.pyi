from typing import Any

from prefork import _dispatch

class Dispatcher(_dispatch.Dispatcher):
    def configure(
        self, template: dict[str, Any], root_path: str, header_map: str
    ) -> None: ...

def template(
    multithread: bool,
    multiprocess: bool,
    errors: Any,
    software: str,
    root_path: str = "",
    scheme: str = "http",
) -> dict[str, Any]: ...

class FileWrapper:
    def __init__(self, file: Any, block_size: int = 65536) -> None: ...
