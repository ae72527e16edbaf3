ALTER TABLE spent_short_tokens DROP COLUMN address;
DROP INDEX refresh_tokens_main_token_idx;
ALTER TABLE refresh_tokens DROP COLUMN main_expires_at, DROP COLUMN main_token_id;
DROP TABLE revoked_tokens;
