-- A web process waits for a job's events no more.
-- KEYS 1 job.  ARGV 1 web process.
-- Returns {1, what becomes of the job} if nobody waits now; {0} if somebody does, or it has ended; {2} if it is not known.
local job = redis.call('HMGET', KEYS[1], 'watch', 'state', 'keep')
if not job[1] then return {2} end
local left = {}
for web in string.gmatch(job[1], '%S+') do
  if web ~= ARGV[1] then left[#left + 1] = web end
end
redis.call('HSET', KEYS[1], 'watch', table.concat(left, ' '))
if #left > 0 or job[2] == 'ended' then return {0} end
local t = redis.call('TIME')
redis.call('HSET', KEYS[1], 'left', t[1] * 1000 + math.floor(t[2] / 1000))
return {1, job[3]}
