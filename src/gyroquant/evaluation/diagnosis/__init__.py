"""Diagnosis of a rounded model against its original: one file a measurement, and the report that shows them.

`run.diagnose` runs both models block by block and returns every measurement as plain data. `folder.write_report` writes
the data as JSON, as a Markdown table, as an HTML page with a plot, and in the schema of Every Eval Ever.
"""
