-- An owner keeps its jobs. A lease that ran out may be renewed as long as nobody took the job.
-- KEYS 1… job and leases, in turn.  ARGV 1 lease (ms), 2… id and attempt, in turn.
-- Returns for each: 1 kept; 0 lost; 2 kept, but it is to be cancelled.
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local answer = {}
for i = 1, #KEYS, 2 do
  local job = redis.call('HMGET', KEYS[i], 'attempt', 'state', 'cancel')
  if job[1] == ARGV[i + 2] and job[2] == 'leased' then
    redis.call('ZADD', KEYS[i + 1], now + ARGV[1], ARGV[i + 1])
    answer[#answer + 1] = job[3] and 2 or 1
  else
    answer[#answer + 1] = 0
  end
end
return answer
