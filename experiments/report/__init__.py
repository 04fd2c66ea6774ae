"""`acodm report`: one page that opens in any browser, and pictures."""
