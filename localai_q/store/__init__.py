"""Postgres: what nodes, replicas, models, jobs and keys are. Owns tables, queries and migrations; decides nothing."""
