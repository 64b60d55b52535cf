-- A web process waits for a job's events from now on, and reads what is in the journal behind a place.
-- KEYS 1 job, 2 journal.  ARGV 1 web process, 2 the place '<attempt>-<index>' or '0-0', 3 most entries.
-- Returns the entries; false if there is a journal that has not got that place.
local watch = redis.call('HGET', KEYS[1], 'watch')
if watch then
  if not string.find(' ' .. watch .. ' ', ' ' .. ARGV[1] .. ' ', 1, true) then
    redis.call('HSET', KEYS[1], 'watch', watch .. ' ' .. ARGV[1])
  end
  redis.call('HDEL', KEYS[1], 'left')
end
-- Where there is no journal, its owner may restore it.
if ARGV[2] ~= '0-0' and redis.call('EXISTS', KEYS[2]) == 1 and not redis.call('XRANGE', KEYS[2], ARGV[2], ARGV[2])[1] then
  return false
end
return redis.call('XRANGE', KEYS[2], '(' .. ARGV[2], '+', 'COUNT', ARGV[3])
