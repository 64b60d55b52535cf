-- Events go into the journal and are announced, in this order, if the attempt is still the job's own.
-- KEYS 1 job, 2 journal.  ARGV 1 id, 2 attempt, 3 first index, 4 longest journal, 5… events.
-- Returns 1 written; 0 fenced: somebody else has the job, or nobody; 2 written, but it is to be cancelled; -1 the journal
-- is gone; -2 the journal is full.
local job = redis.call('HMGET', KEYS[1], 'attempt', 'state', 'cancel', 'watch')
if job[1] ~= ARGV[2] or job[2] ~= 'leased' then return 0 end
local index = tonumber(ARGV[3])
if index + #ARGV - 5 > tonumber(ARGV[4]) then return -2 end
for i = 5, #ARGV do
  local id = ARGV[2] .. '-' .. (index + i - 5)
  local added = redis.pcall('XADD', KEYS[2], 'NOMKSTREAM', id, 'e', ARGV[i])
  if not added then return -1 end
  -- An id that is taken is this owner's own write, whose answer was lost: it is tried again word for word.
  if type(added) == 'string' then
    for web in string.gmatch(job[4], '%S+') do
      redis.call('PUBLISH', 'web:' .. web, ARGV[1] .. ' ' .. id .. ' ' .. ARGV[i])
    end
  elseif not string.find(added.err, 'equal or smaller', 1, true) then
    return added
  end
end
if job[3] then return 2 end
return 1
