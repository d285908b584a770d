"""Pictures and pages made of results; needs the extra `report`."""
