-- mixed.lua - requests of many kinds, in turn: for runs that look for growth.
local kinds = {
  wrk.format("GET", "/"),
  wrk.format("GET", "/json?name=value&other=%20x", {["Cookie"] = "a=1; b=2"}),
  wrk.format("POST", "/echo", {["Content-Type"] = "text/plain"}, string.rep("x", 1000)),
  wrk.format("POST", "/echo", {["Transfer-Encoding"] = "chunked"},
             "5\r\nhello\r\n6;a=b\r\n world\r\n0\r\nX-Trailer: 1\r\n\r\n"),
  wrk.format("GET", "/stream"),
  wrk.format("HEAD", "/json"),
  wrk.format("GET", "/large"),
  wrk.format("GET", "/kept"),
  wrk.format("GET", "/missing"),
  wrk.format("GET", "/raise"),
  wrk.format("GET", "/", {["Connection"] = "close"}),
  wrk.format("BAD METHOD", "/"),
  wrk.format("POST", "/echo", nil, string.rep("y", 70000)),
}
-- wrk.format adds Content-Length to a body; a chunked one must not have it.
kinds[4] = "POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
           .. "5\r\nhello\r\n6;a=b\r\n world\r\n0\r\nX-Trailer: 1\r\n\r\n"
-- The rare ones are rare: a close or a large body now and then.
local turn, plain = 0, 8
function request()
  turn = turn + 1
  if turn % 50 == 0 then
    return kinds[plain + 1 + (turn / 50) % (#kinds - plain)]
  end
  return kinds[1 + turn % plain]
end
