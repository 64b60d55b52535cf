-- An owner keeps its jobs. A lease that ran out may be renewed as long as nobody took the job.
-- KEYS 1… job and leases, in turn.  ARGV 1 lease (ms), 2… id, attempt and owner, in turn.
-- Returns for each: 1 kept; 0 fenced; 2 kept, but it is to be cancelled; -1 the job or its last claim is lost.
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local answer = {}
for n = 0, #KEYS / 2 - 1 do
  local key, leases = KEYS[2 * n + 1], KEYS[2 * n + 2]
  local id, attempt, owner = ARGV[3 * n + 2], ARGV[3 * n + 3], ARGV[3 * n + 4]
  local job = redis.call('HMGET', key, 'state', 'attempt', 'owner', 'cancel')
  if not job[1] or (job[1] ~= 'ended' and tonumber(job[2]) < tonumber(attempt)) then
    answer[n + 1] = -1
  elseif job[1] ~= 'leased' or job[2] ~= attempt or job[3] ~= owner then
    answer[n + 1] = 0
  else
    redis.call('ZADD', leases, now + ARGV[1], id)
    answer[n + 1] = job[4] and 2 or 1
  end
end
return answer
