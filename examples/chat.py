"""A chat over WebSockets: `prefork chat:app --app-dir examples --bind :8080`.

Open http://localhost:8080/ twice, with `--workers 1`: those who talk to each other have
to be in one process; more of them would share what is said through Redis or the like.
"""

from prefork import ClientDisconnected, Response

PAGE = """<!doctype html>
<title>chat</title>
<form><input autofocus> <button>say</button></form>
<ul></ul>
<script>
const socket = new WebSocket("ws" + location.href.slice(4));
const input = document.querySelector("input");
socket.onmessage = ({data}) => {
  document.querySelector("ul").append(
    Object.assign(document.createElement("li"), {textContent: data}));
};
document.forms[0].onsubmit = () => {
  socket.send(input.value);
  input.value = "";
  return false;
};
</script>
"""

here = set()


async def app(request):
    if "upgrade" not in request.headers:
        return Response(PAGE, content_type="text/html; charset=utf-8")
    websocket = await request.websocket()
    here.add(websocket)
    try:
        await say(f"{len(here)} are here")
        async for message in websocket:
            await say(message)
    finally:
        here.discard(websocket)


async def say(message):
    """Tell all; a slow reader holds up who talks, not who listens."""
    for websocket in list(here):
        try:
            await websocket.send(message)
        except ClientDisconnected:
            here.discard(websocket)
