"""The smallest answer of hello.py, by Django; its middleware says how long it is."""

import django
from django.conf import settings
from django.core.handlers.wsgi import WSGIHandler
from django.http import HttpResponse
from django.urls import path

settings.configure(
    ALLOWED_HOSTS=["*"],
    ROOT_URLCONF=__name__,
    SECRET_KEY="of no use here",
    MIDDLEWARE=["django.middleware.common.CommonMiddleware"],
    LOGGING_CONFIG=None,
)
django.setup()


def hello(request):
    return HttpResponse(b"Hello, World!", content_type="text/plain; charset=utf-8")


urlpatterns = [path("", hello)]
app = WSGIHandler()
