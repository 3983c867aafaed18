-- wrk sends sixteen requests at once and waits for their sixteen answers.
local depth = 16

function init(args)
    local requests = {}
    for i = 1, depth do
        requests[i] = wrk.format()
    end
    batch = table.concat(requests)
end

function request()
    return batch
end
