// j and k go to the next and the previous latent.
addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || !"jk".includes(event.key)) return;
  const all = [...document.querySelectorAll("article.latent")];
  const at = all.findIndex(one => "#" + one.id === decodeURIComponent(location.hash));
  const to = all[event.key === "j" ? at + 1 : Math.max(0, at - 1)];
  if (to) location.hash = to.id;
});
