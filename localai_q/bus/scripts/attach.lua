-- A web process waits for a job's events from now on, and reads what is in the journal behind a place.
-- KEYS 1 job, 2 journal.  ARGV 1 web process, 2 the place '<attempt>-<index>' or '0-0', 3 most entries.
-- Returns the entries; false if the journal has not got that place and will not get it any more.
local job = redis.call('HMGET', KEYS[1], 'watch', 'state')
if job[1] then
  if not string.find(' ' .. job[1] .. ' ', ' ' .. ARGV[1] .. ' ', 1, true) then
    redis.call('HSET', KEYS[1], 'watch', job[1] .. ' ' .. ARGV[1])
  end
  redis.call('HDEL', KEYS[1], 'left')
end
local top = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)[1]
if ARGV[2] ~= '0-0' and top and not redis.call('XRANGE', KEYS[2], ARGV[2], ARGV[2])[1] then
  -- What is lost comes back as long as the attempt that wrote it, or one after it that knew it, is at work.
  local newer = tonumber(string.match(top[1], '^%d+')) > tonumber(string.match(ARGV[2], '^%d+'))
  if newer or job[2] == 'ended' then return false end
  return {}
end
return redis.call('XRANGE', KEYS[2], '(' .. ARGV[2], '+', 'COUNT', ARGV[3])
