"""The echo of asgi.py for picows, whose listeners are called frame by frame."""

import uvloop
from picows import WSCloseCode, WSListener, WSMsgType, ws_create_server


class Echo(WSListener):
    def on_ws_frame(self, transport, frame):
        if frame.msg_type == WSMsgType.CLOSE:
            transport.send_close(frame.get_close_code() or WSCloseCode.OK)
            transport.disconnect()
        else:
            transport.send(frame.msg_type, frame.get_payload_as_bytes())


async def serve(port):
    server = await ws_create_server(
        lambda request: Echo(), "127.0.0.1", port, backlog=4096
    )
    await server.serve_forever()


def run(port):
    uvloop.run(serve(port))
