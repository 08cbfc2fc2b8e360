"""The server's database: tables, engine, statements and migrations."""
