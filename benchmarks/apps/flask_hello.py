"""The smallest answer of hello.py, by Flask."""

from flask import Flask

app = Flask(__name__)


@app.get("/")
def hello():
    return "Hello, World!", {"Content-Type": "text/plain; charset=utf-8"}
