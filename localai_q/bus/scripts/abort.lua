-- Somebody who does not own a job ends it, if nobody does; else asks the owner to.
-- KEYS 1 job, 2 journal, 3 waiting, 4 leases, 5 ends under that name.
-- ARGV 1 id, 2 end event, 3 expiry of job and journal (ms), 4 'force' ends the job even while it is owned, 5 name under
-- which the end is kept, 6 what the owner is told: '1' to cancel, which stays, 'pause' to keep what is there of it.
-- Returns {1} ended now; {2, node} its owner on that node was asked to cancel; {0} there is nothing to end.
local job = redis.call('HMGET', KEYS[1], 'state', 'node', 'watch')
if not job[1] or job[1] == 'ended' then
  redis.call('ZREM', KEYS[3], ARGV[1])
  redis.call('ZREM', KEYS[4], ARGV[1])
  return {0}
end
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local lease = redis.call('ZSCORE', KEYS[4], ARGV[1])
if lease and tonumber(lease) > now and ARGV[4] ~= 'force' then
  if redis.call('HGET', KEYS[1], 'cancel') ~= '1' then
    redis.call('HSET', KEYS[1], 'cancel', ARGV[6], 'end', ARGV[2])
  end
  redis.call('PUBLISH', 'cancel:' .. job[2], ARGV[1])
  return {2, job[2]}
end
local attempt = redis.call('HINCRBY', KEYS[1], 'attempt', 1)
local last = 0
local top = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
if top[1] then last = tonumber(string.match(top[1][1], '-(%d+)$')) end
local id = attempt .. '-' .. (last + 1)
redis.call('XADD', KEYS[2], id, 'e', ARGV[2])
redis.call('HSET', KEYS[1], 'state', 'ended')
redis.call('HDEL', KEYS[1], 'request')
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('ZREM', KEYS[4], ARGV[1])
redis.call('HSET', KEYS[5], ARGV[1], attempt .. ' ' .. ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
for web in string.gmatch(job[3], '%S+') do
  redis.call('PUBLISH', 'web:' .. web, ARGV[1] .. ' ' .. id .. ' ' .. ARGV[2])
end
-- A node that ends a job after another node's death may not call that one, which is of no use either.
if job[2] then redis.pcall('PUBLISH', 'cancel:' .. job[2], ARGV[1]) end
redis.call('PUBLISH', 'ends', ARGV[5])
return {1}
