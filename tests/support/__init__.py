"""What tests share: waiting, clocks, private Redis servers, the rules of the house."""
