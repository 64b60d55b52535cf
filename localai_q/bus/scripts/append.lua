-- Events go into the journal and are announced, in this order, if the job is still the owner's.
-- KEYS 1 job, 2 journal.  ARGV 1 id, 2 attempt, 3 owner, 4 first index, 5 longest journal, 6… events.
-- Returns 1 written; 0 fenced: somebody else has the job, or nobody; 2 written, but it is to be cancelled; -1 the job, its
-- last claim or what stands before the first index is lost; -2 the journal is full.
local job = redis.call('HMGET', KEYS[1], 'state', 'attempt', 'owner', 'cancel', 'watch')
if not job[1] or (job[1] ~= 'ended' and tonumber(job[2]) < tonumber(ARGV[2])) then return -1 end
if job[1] ~= 'leased' or job[2] ~= ARGV[2] or job[3] ~= ARGV[3] then return 0 end
local index = tonumber(ARGV[4])
if index + #ARGV - 6 > tonumber(ARGV[5]) then return -2 end
-- An attempt's first entry is its marker, so the entry before any other is of the same attempt.
local before = ARGV[2] .. '-' .. (index - 1)
if #redis.call('XRANGE', KEYS[2], before, before) == 0 then return -1 end
for i = 6, #ARGV do
  local id = ARGV[2] .. '-' .. (index + i - 6)
  local added = redis.pcall('XADD', KEYS[2], id, 'e', ARGV[i])
  -- An id that is taken is this owner's own write, whose answer was lost: it is tried again word for word.
  if type(added) == 'string' then
    for web in string.gmatch(job[5], '%S+') do
      redis.call('PUBLISH', 'web:' .. web, ARGV[1] .. ' ' .. id .. ' ' .. ARGV[i])
    end
  elseif not string.find(added.err, 'equal or smaller', 1, true) then
    return added
  end
end
if job[4] then return 2 end
return 1
