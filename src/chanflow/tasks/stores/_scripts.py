"""What Redis does for the store of tasks in one step, as scripts.

Each gets the prefix of the keys first, and then its own arguments. The keys are made from the
prefix, which is the key of each call, too: with a part of it in braces, a cluster has all of them
on the node that gets the call.
"""

from __future__ import annotations

from chanflow.tasks.record import TaskStatus

__all__ = ["DUE", "FORGET", "PAGE", "SET_ASIDE", "STEPS", "TIME"]

STATUSES = ", ".join(f"'{status.value}'" for status in TaskStatus)

# task:ID      hash: r record, c claim, n name, p priority, s status, i number, a from when on it may
#              run, m its entry in the queue
# key:KEY      the id that has this idempotency key
# claim:WORKER the ids that a claim took, in case that it is repeated
# all, status:STATUS            ids by number, which is the order of their making
# later                         ID\0NAME by when it is due
# ready:NAME                    entries by rank; those of one rank are in the order of what they begin with
# running:NAME                  ids
# expiring                      ids by when they expire
COMMON = f"""
local prefix = ARGV[1]
local STATUSES = {{{STATUSES}}}
local LOST = -1000000

-- Where it is kept, with the fields that were asked for; nil if it isn't, or is somebody else's.
local function fields(id, ...)
    local found = redis.pcall('HMGET', prefix .. 'task:' .. id, ...)
    if found.err or not found[1] then return nil end
    return found
end

-- Let go of an id whose record is gone.
local function drop(id, name)
    redis.call('ZREM', prefix .. 'all', id)
    redis.call('ZREM', prefix .. 'expiring', id)
    for _, status in ipairs(STATUSES) do redis.call('ZREM', prefix .. 'status:' .. status, id) end
    if name then
        redis.call('ZREM', prefix .. 'later', id .. '\\0' .. name)
        redis.call('SREM', prefix .. 'running:' .. name, id)
    end
end

local function entry_of(due, number, id) return string.format('%020.6f', due) .. number .. id end

local function queue(id, name, rank, due, number)
    local entry = entry_of(due, number, id)
    redis.call('ZADD', prefix .. 'ready:' .. name, rank, entry)
    redis.call('HSET', prefix .. 'task:' .. id, 'm', entry)
end

local function id_of(entry) return string.sub(entry, 37) end

-- Move what has become due to the queues.
local function promote(now)
    local due = redis.call('ZRANGEBYSCORE', prefix .. 'later', '-inf', now, 'WITHSCORES', 'LIMIT', 0, 1000)
    for at = 1, #due, 2 do
        local split = string.find(due[at], '\\0', 1, true)
        local id, name = string.sub(due[at], 1, split - 1), string.sub(due[at], split + 1)
        redis.call('ZREM', prefix .. 'later', due[at])
        local task = fields(id, 'n', 'p', 's', 'i')
        if not task then
            drop(id, name)
        else
            local rank = task[3] == 'running' and LOST or -tonumber(task[2])
            queue(id, name, rank, tonumber(due[at + 1]), task[4])
        end
    end
end

local function move(id, number, before, after, name)
    if before == after then return end
    redis.call('ZREM', prefix .. 'status:' .. before, id)
    redis.call('ZADD', prefix .. 'status:' .. after, number, id)
    if before == 'running' then redis.call('SREM', prefix .. 'running:' .. name, id) end
    if after == 'running' then redis.call('SADD', prefix .. 'running:' .. name, id) end
end

local function next_later()
    local first = redis.call('ZRANGE', prefix .. 'later', 0, 0, 'WITHSCORES')
    return first[2] or ''
end
"""
STEPS = f"""{COMMON}
local writer, listens = ARGV[2], tonumber(ARGV[3])
local news = {{}}
local steps = {{}}

local function add(found, id)
    local task = fields(id, 'r', 'c')
    if task then
        for _, each in ipairs({{id, task[1], task[2] or ''}}) do found[#found + 1] = each end
    end
end

-- New tasks: for each, nothing, or the one that has its id or key already.
function steps.create(first, last)
    local made = {{}}
    for at = first, last, 9 do
        local id, record, name, status, priority, due, ready, key, run_at = unpack(ARGV, at, at + 8)
        local task, there = fields(id, 'r', 'c'), id
        if not task and key ~= '' then
            there = redis.call('GET', prefix .. 'key:' .. key)
            task = there and fields(there, 'r', 'c')
            if not task then redis.call('SET', prefix .. 'key:' .. key, id) end
        end
        if task then
            made[#made + 1] = {{there, task[1], task[2]}}
        else
            local number = string.format('%016d', redis.call('INCR', prefix .. 'number'))
            local place = prefix .. 'task:' .. id
            if ready ~= '' then
                local entry = entry_of(tonumber(due), number, id)
                redis.call('ZADD', prefix .. 'ready:' .. name, -tonumber(priority), entry)
                redis.call(
                    'HSET', place, 'r', record, 'n', name, 'p', priority, 's', status, 'i', number, 'a', run_at,
                    'm', entry
                )
            else
                redis.call(
                    'HSET', place, 'r', record, 'n', name, 'p', priority, 's', status, 'i', number, 'a', run_at
                )
                if due ~= '' then redis.call('ZADD', prefix .. 'later', due, id .. '\\0' .. name) end
            end
            redis.call('ZADD', prefix .. 'all', number, id)
            redis.call('ZADD', prefix .. 'status:' .. status, number, id)
            made[#made + 1] = false
            news[#news + 1] = {{id, name, status, false}}
        end
    end
    return made
end

-- A task in the place of what it was: whether that is done.
function steps.change(first, last)
    local id, old, claimed, new, status, due, ttl, expires, key, is_news, cancelling, run_at = unpack(ARGV, first, last)
    local task = fields(id, 'r', 'c', 'n', 's', 'i', 'm')
    if not task then return 0 end
    if task[1] == new and not task[2] then return 1 end
    if task[1] ~= old or (task[2] or '') ~= claimed then return 0 end
    local place, name = prefix .. 'task:' .. id, task[3]
    if task[6] then redis.call('ZREM', prefix .. 'ready:' .. name, task[6]) end
    move(id, task[5], task[4], status, name)
    redis.call('HSET', place, 'r', new, 's', status, 'a', run_at)
    redis.call('HDEL', place, 'c', 'm')
    if due ~= '' then redis.call('ZADD', prefix .. 'later', due, id .. '\\0' .. name)
    else redis.call('ZREM', prefix .. 'later', id .. '\\0' .. name) end
    if expires ~= '' then redis.call('ZADD', prefix .. 'expiring', expires, id)
    elseif status == 'pending' then redis.call('ZREM', prefix .. 'expiring', id) end
    if ttl ~= '' then redis.call('PEXPIRE', place, ttl)
    elseif status == 'pending' then redis.call('PERSIST', place) end
    if key ~= '' then
        if ttl ~= '' then redis.call('PEXPIRE', prefix .. 'key:' .. key, ttl)
        else redis.call('PERSIST', prefix .. 'key:' .. key) end
    end
    if is_news ~= '' then news[#news + 1] = {{id, name, status, cancelling ~= ''}} end
    return 1
end

-- Runs: when the next task is due, and the tasks.
function steps.claim(first, last)
    local worker, now, lease_until, limit, only = unpack(ARGV, first, first + 4)
    local found, ids = {{''}}, {{}}
    local again = redis.call('GET', prefix .. 'claim:' .. worker)
    if again then
        for _, id in ipairs(cmsgpack.unpack(again)) do add(found, id) end
        return found
    end
    promote(now)
    local most, heads = {{}}, {{}}
    limit = tonumber(limit)

    local function look(name)
        local head = redis.call('ZRANGE', prefix .. 'ready:' .. name, 0, 0, 'WITHSCORES')
        heads[name] = head[1] and {{tonumber(head[2]), head[1]}} or nil
    end

    local function full(name)
        return most[name] and redis.call('SCARD', prefix .. 'running:' .. name) >= most[name]
    end

    local function start(id, name)
        local task = fields(id, 'n', 's', 'i', 'm', 'c', 'r')
        if not task then
            drop(id, name)
            return
        end
        if task[4] then redis.call('ZREM', prefix .. 'ready:' .. name, task[4]) end
        move(id, task[3], task[2], 'running', name)
        -- After those of workers that are gone.
        local claimed = (task[5] or '') .. worker .. ' ' .. now .. ' ' .. lease_until .. '\\n'
        redis.call('HSET', prefix .. 'task:' .. id, 'c', claimed, 's', 'running')
        redis.call('HDEL', prefix .. 'task:' .. id, 'm')
        redis.call('ZADD', prefix .. 'later', lease_until, id .. '\\0' .. name)
        ids[#ids + 1] = id
        news[#news + 1] = {{id, name, 'running', false}}
        for _, each in ipairs({{id, task[6], claimed}}) do found[#found + 1] = each end
    end

    for at = first + 5, last, 2 do most[ARGV[at]] = tonumber(ARGV[at + 1]) end
    if only ~= '' then
        local task = fields(only, 'n', 's', 'm', 'a')
        for at = first + 5, last, 2 do
            local name = ARGV[at]
            if task and task[1] == name then
                if task[2] == 'running' and task[3] then
                    start(only, name)
                elseif task[2] == 'pending' and tonumber(task[4]) <= tonumber(now) and not full(name) then
                    start(only, name)
                end
            end
        end
    else
        for at = first + 5, last, 2 do look(ARGV[at]) end
        while #ids < limit do
            local best
            for name, head in pairs(heads) do
                local is_first = not best or head[1] < heads[best][1]
                    or (head[1] == heads[best][1] and head[2] < heads[best][2])
                if is_first and (head[1] <= LOST or not full(name)) then best = name end
            end
            if not best then break end
            local entry = heads[best][2]
            redis.call('ZREM', prefix .. 'ready:' .. best, entry)
            start(id_of(entry), best)
            look(best)
        end
    end
    if #ids < limit then found[1] = next_later() end
    if #ids > 0 then redis.call('SET', prefix .. 'claim:' .. worker, cmsgpack.pack(ids), 'PX', 15000) end
    return found
end

local results, at = {{}}, 4
while at <= #ARGV do
    local last = at + 1 + tonumber(ARGV[at + 1])
    results[#results + 1] = steps[ARGV[at]](at + 2, last)
    at = last + 1
end

-- Unless nobody else listens.
if #news > 0 and redis.call('PUBSUB', 'NUMSUB', prefix .. 'news')[2] > listens then
    -- Of too many, only that there are some.
    local told = #news <= 1000 and news or {{}}
    table.insert(told, 1, writer)
    redis.call('PUBLISH', prefix .. 'news', cmsgpack.pack(told))
end
return results
"""
DUE = f"""{COMMON}
promote(ARGV[2])
local found, left = {{next_later()}}, tonumber(ARGV[3])
for at = 4, #ARGV do
    if left > 0 then
        for _, entry in ipairs(redis.call('ZRANGE', prefix .. 'ready:' .. ARGV[at], 0, left - 1)) do
            local id = id_of(entry)
            local task = fields(id, 'r', 'c')
            if task then
                for _, each in ipairs({{id, task[1], task[2] or ''}}) do found[#found + 1] = each end
                left = left - 1
            else
                redis.call('ZREM', prefix .. 'ready:' .. ARGV[at], entry)
                drop(id, ARGV[at])
            end
        end
    end
end
return found
"""
SET_ASIDE = f"""{COMMON}
local task = fields(ARGV[2], 'n', 'm')
if task and task[2] then redis.call('ZREM', prefix .. 'ready:' .. task[1], task[2]) end
drop(ARGV[2], task and task[1])
redis.call('SADD', prefix .. 'unreadable', ARGV[2])
"""
PAGE = f"""{COMMON}
local chosen, after, limit = ARGV[2], ARGV[3], tonumber(ARGV[4])
local below, found, left = '+inf', {{}}, limit
if after ~= '' then
    local number = redis.call('ZSCORE', prefix .. 'all', after)
    if not number then return false end
    below = '(' .. number
end
while left > 0 do
    local ids = redis.call('ZREVRANGEBYSCORE', prefix .. chosen, below, '-inf', 'WITHSCORES', 'LIMIT', 0, left)
    if #ids == 0 then break end
    for at = 1, #ids, 2 do
        local task = fields(ids[at], 'r', 'c')
        below = '(' .. ids[at + 1]
        if task then
            for _, each in ipairs({{ids[at], task[1], task[2] or ''}}) do found[#found + 1] = each end
            left = left - 1
        else
            drop(ids[at])
        end
    end
end
return found
"""
FORGET = f"""{COMMON}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', prefix .. 'expiring', '-inf', ARGV[2], 'LIMIT', 0, 1000)) do
    redis.call('DEL', prefix .. 'task:' .. id)
    drop(id)
end
return redis.call('ZCOUNT', prefix .. 'expiring', '-inf', ARGV[2])
"""
TIME = "return redis.call('TIME')"
