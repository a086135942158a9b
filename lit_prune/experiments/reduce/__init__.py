"""The verb `reduce`: score, keep, compile, verify, a record a cell."""
