-- A job joins its line. Check and insert are one step, so a full line refuses without a race.
-- KEYS 1 job, 2 waiting.  ARGV 1 id, 2 request, 3 line, 4 time to its deadline (ms, 0 none), 5 longest line, 6 expiry (ms), 7 watcher,
-- 8 stream (0/1), 9 attempt to count on from, 10 key that asked, 11 outline of the request, 12 what becomes of it when
-- nobody reads it, 13 when it was accepted, 14 the least revision of its model that may serve it.
-- Returns its place in the line, from 1; 0 the line is full; -1 the job is known already.
if redis.call('EXISTS', KEYS[1]) == 1 then return -1 end
if redis.call('ZCARD', KEYS[2]) >= tonumber(ARGV[5]) then return 0 end
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local deadline = ARGV[4] == '0' and 0 or now + ARGV[4]
redis.call('HSET', KEYS[1], 'state', 'waiting', 'request', ARGV[2], 'line', ARGV[3], 'deadline', deadline,
  'attempt', ARGV[9], 'watch', ARGV[7], 'stream', ARGV[8],
  'key', ARGV[10], 'outline', ARGV[11], 'keep', ARGV[12], 'created', ARGV[13], 'revision', ARGV[14])
redis.call('PEXPIREAT', KEYS[1], now + ARGV[6])
redis.call('ZADD', KEYS[2], now, ARGV[1])
return redis.call('ZCARD', KEYS[2])
