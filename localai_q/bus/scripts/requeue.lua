-- Control puts a job whose lease ran out back into its line, and counts one more owner as dead.
-- KEYS 1 job, 2 waiting, 3 leases.  ARGV 1 id, 2 an owner that is known to be dead, whose leases count for nothing.
-- Returns how many owners died of it if it was put back; 0 its lease is alive, or it has ended (then its lease is only cleared).
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local lease = redis.call('ZSCORE', KEYS[3], ARGV[1])
local job = redis.call('HMGET', KEYS[1], 'state', 'owner')
if lease and tonumber(lease) > now and job[2] ~= ARGV[2] then return 0 end
redis.call('ZREM', KEYS[3], ARGV[1])
if job[1] ~= 'leased' then return 0 end
redis.call('HSET', KEYS[1], 'state', 'waiting')
redis.call('ZADD', KEYS[2], now, ARGV[1])
return redis.call('HINCRBY', KEYS[1], 'deaths', 1)
