"use strict";
const themes = ["auto", "light", "dark"];
const themeButton = document.getElementById("theme");
const stored = (value) => {
  try {
    if (value === undefined) return localStorage.getItem("diffdistill-theme");
    localStorage.setItem("diffdistill-theme", value);
  } catch {} // a page opened from a file may have no storage
  return null;
};
const setTheme = (theme) => {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  themeButton.textContent = `Theme: ${theme}`;
};
let theme = themes.includes(stored()) ? stored() : "auto";
setTheme(theme);
themeButton.hidden = false;
themeButton.addEventListener("click", () => {
  theme = themes[(themes.indexOf(theme) + 1) % themes.length];
  setTheme(theme);
  stored(theme);
});
