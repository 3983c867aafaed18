-- wrk sends 10 KiB of JSON, as Python's json writes it.
local row = '{"id": %d, "name": "item %d%s", "tags": ["a", "b"], "price": %d.5}'
local rows = {}
for i = 1, 140 do
    local rest = i == 1 and string.rep(".", 20) or ""
    rows[i] = string.format(row, 10000 + i, 10000 + i, rest, 100 + i)
end
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.body = "[" .. table.concat(rows, ", ") .. "]"
