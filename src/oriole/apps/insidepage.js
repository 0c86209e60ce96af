(() => {
  const all = (root, what) => [...root.querySelectorAll(what)];
  const read = (root) => JSON.parse(root.querySelector("script").textContent);
  const percent = (share) => Math.round(100 * share) + " %";
  const pressed = (chip, action) => {
    chip.addEventListener("click", action);
    chip.addEventListener("keydown", (e) => {
      if (e.key === "Enter" || e.key === " ") { e.preventDefault(); action(); }
    });
  };
  // A sentence of words, and pairs of a name and its share.
  const say = (root, words, pairs) => root.querySelector(".said").replaceChildren(words, ...pairs.flatMap(
    ([name, share]) => {
      const [pair, strong, small] = ["span", "b", "small"].map((tag) => document.createElement(tag));
      strong.textContent = name;
      small.textContent = percent(share);
      pair.append(strong, " ", small);
      return [" ", pair, " "];
    }));
  // The names and weights of the few chips that weigh most.
  const heaviest = (weights, chips, count) => [...weights.keys()]
    .sort((a, b) => weights[b] - weights[a]).slice(0, count).filter((n) => weights[n] > 0.01)
    .map((n) => [chips[n].textContent, weights[n]]);

  const attention = (root) => {
    const data = read(root);
    const maps = data.maps.map((map) => Uint8Array.from(atob(map), (c) => c.charCodeAt(0)));
    const heads = all(root, ".heads button"), asks = all(root, ".asks .tok"), keys = all(root, ".keys .tok");
    const cells = root.querySelector(".cells");
    let head = 0, query = asks.length - 1;
    const show = () => {
      heads.forEach((b, n) => b.setAttribute("aria-pressed", n === head));
      asks.forEach((chip, n) => chip.setAttribute("aria-pressed", n === query));
      cells.innerHTML = heads[head].querySelector("svg").innerHTML;
      root.querySelector("h3").textContent = heads[head].getAttribute("aria-label");
      const seen = data.causal ? query + 1 : keys.length;
      const from = data.causal ? (query * (query + 1)) / 2 : query * seen;
      const row = Array.from(maps[head].subarray(from, from + seen), (w) => w / 255);
      keys.forEach((chip, n) => {
        chip.style.setProperty("--w", n < seen ? row[n] * 0.85 : 0);
        chip.classList.toggle("later", n >= seen);
      });
      say(root, asks[query].textContent + " looks at", heaviest(row, keys, 5));
    };
    heads.forEach((b, n) => b.addEventListener("click", () => { head = n; show(); }));
    asks.forEach((chip, n) => pressed(chip, () => { query = n; show(); }));
    show();
  };

  const experts = (root) => {
    const layers = read(root); // of each layer and token {expert: weight}
    const picks = all(root, ".picks button"), chips = all(root, ".keys .tok"), maps = all(root, ".pic");
    const sorted = (chosen) => Object.entries(chosen).sort((a, b) => b[1] - a[1]);
    const name = (expert) => "expert " + (Number(expert) + 1);
    let pick = picks.find((b) => b.getAttribute("aria-pressed") === "true");
    const show = (token) => {
      const layer = Number(pick.dataset.layer), expert = Number(pick.dataset.expert);
      const weights = layers[layer].map((chosen) => chosen[expert] || 0);
      const taken = weights.filter((w) => w > 0).length;
      picks.forEach((b) => b.setAttribute("aria-pressed", b === pick));
      maps.forEach((map, n) => { map.hidden = n !== layer; });
      const mark = maps[layer].querySelector(".pick");
      mark.setAttribute("y", Number(mark.dataset.top) + Number(mark.dataset.row) * expert);
      root.querySelector("h3").textContent = pick.getAttribute("aria-label");
      chips.forEach((chip, n) => {
        chip.style.setProperty("--w", weights[n] * 0.85);
        chip.setAttribute("aria-pressed", n === token);
      });
      if (token !== undefined) {
        say(root, chips[token].textContent + " goes to", sorted(layers[layer][token])
          .map(([e, share]) => [name(e), share]));
      } else if (taken) {
        say(root, `${name(expert)} gets ${taken} of ${chips.length} tokens and counts most for`,
          heaviest(weights, chips, 6));
      } else {
        say(root, `${name(expert)} gets none of these tokens`, []);
      }
    };
    picks.forEach((b) => b.addEventListener("click", () => { pick = b; show(); }));
    chips.forEach((chip, n) => pressed(chip, () => {
      const first = sorted(layers[pick.dataset.layer][n])[0][0];
      pick = picks.find((b) => b.dataset.layer === pick.dataset.layer && b.dataset.expert === first);
      show(n);
    }));
    show();
  };

  all(document, ".heads-of").forEach(attention);
  all(document, ".routes").forEach(experts);
})();
