-- wrk sends a form of 1 KiB.
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/x-www-form-urlencoded"
wrk.body = string.rep("x", 1024)
