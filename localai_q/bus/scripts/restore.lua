-- An owner gives Redis back what that has lost: the job as it was claimed, its lease, and the whole journal.
-- KEYS 1 job, 2 journal, 3 waiting, 4 leases, 5 epoch.
-- ARGV 1 id, 2 attempt, 3 owner, 4 epoch of the claim, 5 an epoch, if there is none, 6 lease (ms), 7 expiry of the journal
-- (ms), 8 when the job expires (ms since the epoch of Unix, 0 never), 9 how many arguments the job's fields and values are,
-- 10… these, and then id and event of each entry.
-- Returns the epoch that counts from now on; false if the job is not this owner's: it has ended or was claimed or brought
-- back by somebody later, or Redis has lost nothing since the claim, but has forgotten a job that is over.
local job = redis.call('HMGET', KEYS[1], 'state', 'attempt', 'owner')
local same = job[1] == 'leased' and job[2] == ARGV[2] and job[3] == ARGV[3]
-- Attempts only grow: one below this owner's is older than its claim, which Redis has lost.
local older = job[1] and job[1] ~= 'ended' and tonumber(job[2]) < tonumber(ARGV[2])
local lost = not job[1] and redis.call('GET', KEYS[5]) ~= ARGV[4]
if not (same or older or lost) then return false end
local entries = 10 + ARGV[9]
if not same then redis.call('HSET', KEYS[1], unpack(ARGV, 10, entries - 1)) end
if lost and ARGV[8] ~= '0' then redis.call('PEXPIREAT', KEYS[1], ARGV[8]) end
redis.call('DEL', KEYS[2])
for i = entries, #ARGV, 2 do redis.call('XADD', KEYS[2], ARGV[i], 'e', ARGV[i + 1]) end
redis.call('PEXPIRE', KEYS[2], ARGV[7])
local t = redis.call('TIME')
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('ZADD', KEYS[4], t[1] * 1000 + math.floor(t[2] / 1000) + ARGV[6], ARGV[1])
redis.call('SET', KEYS[5], ARGV[5], 'NX')
return redis.call('GET', KEYS[5])
