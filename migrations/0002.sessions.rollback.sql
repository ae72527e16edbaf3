DROP TABLE idempotency_keys;
DROP TABLE session_logs;
DROP TABLE session_events;
DROP TABLE sessions;
DROP TABLE machine_configs;
DROP TABLE providers;
