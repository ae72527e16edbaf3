DROP TABLE dead_letters;
DROP TABLE synced_users;
