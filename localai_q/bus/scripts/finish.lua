-- The owner of a job ends it: once, and only while the attempt is the job's own.
-- KEYS 1 job, 2 journal, 3 waiting, 4 leases, 5 ends of this owner's node, 6 nodes with ends.
-- ARGV 1 id, 2 attempt, 3 index, 4 end event, 5 node, 6 expiry of job and journal (ms).
-- Returns 1 ended; 0 fenced.
local job = redis.call('HMGET', KEYS[1], 'attempt', 'state', 'watch')
if job[1] ~= ARGV[2] or job[2] ~= 'leased' then return 0 end
local id = ARGV[2] .. '-' .. ARGV[3]
redis.call('XADD', KEYS[2], id, 'e', ARGV[4])
redis.call('HSET', KEYS[1], 'state', 'ended')
redis.call('HDEL', KEYS[1], 'request')
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('ZREM', KEYS[4], ARGV[1])
redis.call('HSET', KEYS[5], ARGV[1], ARGV[2] .. ' ' .. ARGV[4])
redis.call('SADD', KEYS[6], ARGV[5])
redis.call('PEXPIRE', KEYS[1], ARGV[6])
redis.call('PEXPIRE', KEYS[2], ARGV[6])
for web in string.gmatch(job[3], '%S+') do
  redis.call('PUBLISH', 'web:' .. web, ARGV[1] .. ' ' .. id .. ' ' .. ARGV[4])
end
redis.call('PUBLISH', 'ends', ARGV[5])
return 1
