-- A web process asks to be told of a job's events from now on.
-- KEYS 1 job.  ARGV 1 watcher.
-- Returns 1 it will be; 0 the job is not known.
local watch = redis.call('HGET', KEYS[1], 'watch')
if not watch then return 0 end
for web in string.gmatch(watch, '%S+') do
  if web == ARGV[1] then return 1 end
end
redis.call('HSET', KEYS[1], 'watch', watch .. ' ' .. ARGV[1])
return 1
