"""Redis: doorbells, lines, leases, journals and signals. Owns every script and key; decides nothing."""
