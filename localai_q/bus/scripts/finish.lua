-- The owner of a job ends it: once, and only while the job is its own.
-- KEYS 1 job, 2 journal, 3 waiting, 4 leases, 5 ends of this owner's node.
-- ARGV 1 id, 2 attempt, 3 owner, 4 index, 5 end event, 6 node, 7 expiry of job and journal (ms).
-- Returns 1 ended; 0 fenced; -1 the job, its last claim or what stands before the end is lost.
local job = redis.call('HMGET', KEYS[1], 'state', 'attempt', 'owner', 'watch')
if not job[1] or (job[1] ~= 'ended' and tonumber(job[2]) < tonumber(ARGV[2])) then return -1 end
if job[1] ~= 'leased' or job[2] ~= ARGV[2] or job[3] ~= ARGV[3] then return 0 end
local before = ARGV[2] .. '-' .. (ARGV[4] - 1)
if #redis.call('XRANGE', KEYS[2], before, before) == 0 then return -1 end
local id = ARGV[2] .. '-' .. ARGV[4]
redis.call('XADD', KEYS[2], id, 'e', ARGV[5])
redis.call('HSET', KEYS[1], 'state', 'ended')
redis.call('HDEL', KEYS[1], 'request')
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('ZREM', KEYS[4], ARGV[1])
redis.call('HSET', KEYS[5], ARGV[1], ARGV[2] .. ' ' .. ARGV[5])
redis.call('PEXPIRE', KEYS[1], ARGV[7])
redis.call('PEXPIRE', KEYS[2], ARGV[7])
for web in string.gmatch(job[4], '%S+') do
  redis.call('PUBLISH', 'web:' .. web, ARGV[1] .. ' ' .. id .. ' ' .. ARGV[5])
end
redis.call('PUBLISH', 'ends', ARGV[6])
return 1
