from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    compiler: str
    cxx_standard: int
    torch_version: str
    sanitizers: str
    cpu_capabilities: tuple[str, ...]
    cpu_capability: str
    cuda_version: str | None
    cuda_architectures: tuple[str, ...]

def build_info() -> BuildInfo: ...
