"""The smallest app: `make serve`, or `prefork hello:app` in this directory."""


def app(request):
    return b"Hello, World!"
