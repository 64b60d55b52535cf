-- An owner takes a job: check, raise the attempt, write the marker into the journal, and only then read how far the
-- journal goes, so that what the owner is told can neither miss an entry nor be overtaken by one.
-- KEYS 1 job, 2 journal, 3 waiting, 4 leases, 5 epoch.  ARGV 1 id, 2 owner, 3 node, 4 lease (ms), 5 expiry of the journal
-- (ms), 6 an epoch, if there is none yet, 7 the revision of its model that the owner serves.
-- Returns {1, last index, epoch, the job's fields and values in turn, the journal's entries, time to the deadline (ms) or
-- false} or {0, why not}.
local job = redis.call('HMGET', KEYS[1], 'state', 'cancel', 'deadline', 'revision')
if not job[1] then
  redis.call('ZREM', KEYS[3], ARGV[1])
  redis.call('ZREM', KEYS[4], ARGV[1])
  return {0, 'unknown'}
end
if job[1] == 'ended' then return {0, 'ended'} end
if job[2] then return {0, 'cancelled'} end
-- Whether a lease that ran out means a dead owner is judged by who puts the job back into its line.
if job[1] == 'leased' and redis.call('ZSCORE', KEYS[4], ARGV[1]) then return {0, 'leased'} end
-- Who asked after the model was changed is answered by the model as it is.
if tonumber(job[4] or 0) > tonumber(ARGV[7]) then return {0, 'newer'} end
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local deadline = tonumber(job[3])
if deadline > 0 and deadline <= now then return {0, 'late'} end
local attempt = redis.call('HINCRBY', KEYS[1], 'attempt', 1)
local last = 0
local top = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
if top[1] then last = tonumber(string.match(top[1][1], '-(%d+)$')) end
redis.call('XADD', KEYS[2], attempt .. '-' .. last, 'e', '{"k":"m"}')
redis.call('PEXPIRE', KEYS[2], ARGV[5])
redis.call('HSET', KEYS[1], 'state', 'leased', 'owner', ARGV[2], 'node', ARGV[3], 'claimed', now)
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('ZADD', KEYS[4], now + ARGV[4], ARGV[1])
redis.call('SET', KEYS[5], ARGV[6], 'NX')
local entries = redis.call('XRANGE', KEYS[2], '-', '+')
return {1, last, redis.call('GET', KEYS[5]), redis.call('HGETALL', KEYS[1]), entries, deadline > 0 and deadline - now}
