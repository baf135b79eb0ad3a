// Knows what time it is for the server: the clock of a phone may be minutes off.

let ahead = 0;

/** The server told its time. */
export const told = (atMs) => {
  ahead = atMs - Date.now();
};

/** Ms since 1970, by the server's clock. */
export const now = () => Date.now() + ahead;
