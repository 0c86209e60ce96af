(() => {
  const data = JSON.parse(document.getElementById("weights").textContent);
  const maps = data.maps.map((map) => Uint8Array.from(atob(map), (c) => c.charCodeAt(0)));
  const heads = [...document.querySelectorAll(".heads button")];
  const chips = [...document.querySelectorAll("#attention .chips .tok")];
  const cells = document.querySelector("#attention .cells");
  const name = document.getElementById("head");
  const said = document.getElementById("said");
  let head = 0;
  let query = chips.length - 1;
  const show = () => {
    heads.forEach((b, n) => b.setAttribute("aria-pressed", n === head));
    cells.innerHTML = heads[head].querySelector("svg").innerHTML;
    name.textContent = heads[head].getAttribute("aria-label");
    const from = (query * (query + 1)) / 2;
    const row = maps[head].subarray(from, from + query + 1);
    chips.forEach((chip, n) => {
      chip.style.setProperty("--w", n <= query ? (row[n] / 255) * 0.85 : 0);
      chip.classList.toggle("later", n > query);
      chip.setAttribute("aria-pressed", n === query);
    });
    const most = [...row.keys()].sort((a, b) => row[b] - row[a]).slice(0, 5).filter((n) => row[n] > 2);
    said.textContent = chips[query].textContent + " looks at " +
      most.map((n) => chips[n].textContent + " " + Math.round((100 * row[n]) / 255) + " %").join(", ");
  };
  heads.forEach((b, n) => b.addEventListener("click", () => { head = n; show(); }));
  chips.forEach((chip, n) => {
    chip.addEventListener("click", () => { query = n; show(); });
    chip.addEventListener("keydown", (e) => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); query = n; show(); } });
  });
  show();
})();
