"""Reports for people and for programs: tables, figures and one offline HTML page."""
