"""Native handlers: the smallest answer, and one of 1 MiB."""

BIG = b"x" * (1 << 20)


def app(request):
    return b"Hello, World!"


def big(request):
    return BIG
