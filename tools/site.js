// The pages' own script: theme, chapter drawer, search, copy buttons, section list. Works from file://, loads nothing.
(() => {
  const root = document.documentElement;
  const up = document.currentScript.dataset.up;
  const address = new URLSearchParams(location.search);

  // theme: ?theme=dark, then what was chosen before, then the system's wish. Set before the page is drawn.
  const memory = {
    get: (key) => { try { return localStorage.getItem(key); } catch { return null; } },
    set: (key, value) => { try { localStorage.setItem(key, value); } catch { /* not allowed here */ } },
  };
  const theme = address.get("theme") || memory.get("udm-book-theme");
  if (theme === "light" || theme === "dark") root.dataset.theme = theme;

  function switchTheme() {
    const dark = root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    memory.set("udm-book-theme", root.dataset.theme);
  }

  // search: the index is a script, so that it can be read from disk; it is loaded on first use
  let entries = null;
  function loadIndex() {
    entries = entries || new Promise((resolve) => {
      const script = document.createElement("script");
      script.src = up + "search.js";
      script.onload = () => resolve(window.SEARCH.flatMap((page) => page.parts.map(([id, heading, text]) => ({
        url: page.url, id, page: page.title, heading, text,
        title: `${page.title} ${heading}`.toLowerCase(), lower: text.toLowerCase(), first: !id,
      }))));
      document.head.append(script);
    });
    return entries;
  }

  const split = (text) => text.toLowerCase().split(/\s+/).filter(Boolean);

  function score(entry, words) {
    let total = 0;
    for (const word of words) {
      const inTitle = entry.title.includes(word);
      const at = entry.lower.indexOf(word);
      if (!inTitle && at < 0) return 0;
      const whole = at >= 0 && !/\w/.test(entry.lower[at - 1] || " ");
      total += (inTitle ? 12 : 0) + (whole ? 3 : at >= 0 ? 1 : 0);
      total += Math.min(4, at < 0 ? 0 : entry.lower.split(word).length - 1);
    }
    const phrase = words.join(" ");
    return total + (entry.title.includes(phrase) ? 10 : 0) + (entry.lower.includes(phrase) ? 5 : 0) + (entry.first ? 1 : 0);
  }

  function marked(text, words) {
    const pattern = new RegExp(`(${words.map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|")})`, "gi");
    const out = document.createDocumentFragment();
    text.split(pattern).forEach((piece, i) => {
      const node = i % 2 ? document.createElement("mark") : document.createTextNode(piece);
      if (i % 2) node.textContent = piece;
      out.append(node);
    });
    return out;
  }

  function excerpt(entry, words) {
    const places = words.map((word) => entry.lower.indexOf(word)).filter((at) => at >= 0);
    const start = Math.max(0, (places.length ? Math.min(...places) : 0) - 40);
    return (start ? "…" : "") + entry.text.slice(start, start + 130) + "…";
  }

  function setUpSearch() {
    const input = document.getElementById("query");
    const hits = document.getElementById("hits");
    const chapters = document.querySelector(".chapters");
    let chosen = 0;

    function choose(index) {
      const links = [...hits.querySelectorAll("a")];
      if (!links.length) return;
      chosen = (index + links.length) % links.length;
      links.forEach((link, i) => link.classList.toggle("chosen", i === chosen));
      links[chosen].scrollIntoView({ block: "nearest" });
    }

    async function search() {
      const words = split(input.value);
      const active = words.join("").length > 1;
      hits.hidden = !active;
      chapters.hidden = active;
      input.setAttribute("aria-expanded", String(active));
      if (!active) return;
      const found = (await loadIndex())
        .map((entry) => [score(entry, words), entry])
        .filter(([points]) => points > 0)
        .sort((a, b) => b[0] - a[0])
        .slice(0, 20);
      hits.replaceChildren(...found.map(([, entry]) => {
        const item = document.createElement("li");
        const link = document.createElement("a");
        const head = document.createElement("b");
        const text = document.createElement("small");
        link.href = `${up}${entry.url}?q=${encodeURIComponent(words.join(" "))}${entry.id ? "#" + entry.id : ""}`;
        head.append(marked(entry.heading ? `${entry.page} · ${entry.heading}` : entry.page, words));
        text.append(marked(excerpt(entry, words), words));
        item.setAttribute("role", "option");
        link.append(head, text);
        item.append(link);
        return item;
      }));
      if (!found.length) hits.textContent = "Nothing found.";
      choose(0);
    }

    input.addEventListener("focus", loadIndex);
    input.addEventListener("input", search);
    input.addEventListener("keydown", (event) => {
      if (event.key === "ArrowDown") choose(chosen + 1);
      else if (event.key === "ArrowUp") choose(chosen - 1);
      else if (event.key === "Enter") hits.querySelector("a.chosen")?.click();
      else if (event.key === "Escape") { input.value = ""; search(); input.blur(); }
      else return;
      event.preventDefault();
    });
    document.addEventListener("keydown", (event) => {
      if (event.key !== "/" || event.ctrlKey || event.metaKey || event.target.matches("input, textarea")) return;
      event.preventDefault();
      document.getElementById("side").classList.add("open");
      input.focus();
    });
    if (address.get("search")) { input.value = address.get("search"); search(); }
  }

  // words of a search that led here
  function highlight(words) {
    const walker = document.createTreeWalker(document.querySelector("article"), NodeFilter.SHOW_TEXT, (node) =>
      node.parentElement.closest("math, script, style, .copy") ? NodeFilter.FILTER_REJECT : NodeFilter.FILTER_ACCEPT);
    const nodes = [];
    while (walker.nextNode()) nodes.push(walker.currentNode);
    for (const node of nodes) {
      const lower = node.data.toLowerCase();
      if (words.some((word) => lower.includes(word))) node.replaceWith(marked(node.data, words));
    }
  }

  function addCopyButtons() {
    document.querySelectorAll("div.sourceCode").forEach((box) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "copy";
      button.textContent = "Copy";
      button.addEventListener("click", async () => {
        await navigator.clipboard.writeText(box.querySelector("code").innerText);
        button.textContent = "Copied";
        setTimeout(() => { button.textContent = "Copy"; }, 1500);
      });
      box.append(button);
    });
  }

  function addAnchors() {
    document.querySelectorAll("article :is(h2, h3)[id]").forEach((heading) => {
      const link = document.createElement("a");
      link.className = "anchor";
      link.href = "#" + heading.id;
      link.textContent = "#";
      link.setAttribute("aria-label", "Link to this section");
      heading.append(link);
    });
  }

  // the section that is being read, marked in the list on the right
  function followReading() {
    const links = new Map([...document.querySelectorAll(".contents li a")].map((a) => [a.hash.slice(1), a]));
    const headings = [...links.keys()].map((id) => document.getElementById(id)).filter(Boolean);
    if (!headings.length) return;
    function update() {
      const above = headings.filter((heading) => heading.getBoundingClientRect().top < 120);
      const current = above.at(-1);
      links.forEach((link, id) => link.classList.toggle("here", current?.id === id));
    }
    addEventListener("scroll", update, { passive: true });
    update();
  }

  document.addEventListener("DOMContentLoaded", () => {
    const side = document.getElementById("side");
    const menu = document.getElementById("menu");
    document.getElementById("theme").addEventListener("click", switchTheme);
    menu.addEventListener("click", () => menu.setAttribute("aria-expanded", String(side.classList.toggle("open"))));
    document.getElementById("main").addEventListener("click", () => side.classList.remove("open"));
    const here = side.querySelector("[aria-current]");
    if (here) side.scrollTop = here.offsetTop - side.clientHeight / 2;
    setUpSearch();
    addCopyButtons();
    addAnchors();
    followReading();
    if (address.get("q")) highlight(split(address.get("q")));
    if (location.hash) document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
  });
})();
