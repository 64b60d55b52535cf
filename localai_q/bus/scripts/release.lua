-- An owner that must stop gives its job back to the line; the place is that of the time of giving back.
-- KEYS 1 job, 2 waiting, 3 leases.  ARGV 1 id, 2 attempt, 3 owner, 4 owners that died of it (0/1).
-- Returns 1 given back; 0 it was not this owner's any more; -1 the job or its last claim
-- is lost.
local job = redis.call('HMGET', KEYS[1], 'state', 'attempt', 'owner')
if not job[1] or (job[1] ~= 'ended' and tonumber(job[2]) < tonumber(ARGV[2])) then return -1 end
if job[1] ~= 'leased' or job[2] ~= ARGV[2] or job[3] ~= ARGV[3] then return 0 end
local t = redis.call('TIME')
redis.call('HSET', KEYS[1], 'state', 'waiting')
redis.call('HINCRBY', KEYS[1], 'deaths', ARGV[4])
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('ZADD', KEYS[2], t[1] * 1000 + math.floor(t[2] / 1000), ARGV[1])
return 1
