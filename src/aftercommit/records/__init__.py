"""What the database remembers: tables and state moves. All our SQL on them is here."""
