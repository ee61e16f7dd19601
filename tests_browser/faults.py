"""What may be wrong with a page as a reader meets it; each check gives sentences, none if all is well."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

from chromium import Page

CONTRAST = 4.5
"""Of text on its background, as WCAG 2 counts it: between 1 and 21, at least 4.5 for level AA."""

WIDE = 1280
"""Pixels from which on a page has room for every code box, output and table."""

PICTURES = """Promise.all([...document.images].map(async image => {
    if (!image.complete || !image.naturalWidth) return `image ${image.src} is not loaded`;
    if (location.protocol == 'file:') return '';  // which lets nobody look into images
    const canvas = document.createElement('canvas');
    const [width, height] = [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    const context = canvas.getContext('2d');
    context.drawImage(image, 0, 0);
    const pixels = new Uint32Array(context.getImageData(0, 0, width, height).data.buffer);
    return pixels.every(pixel => pixel == pixels[0]) ? `image ${image.src} is blank` : '';
})).then(said => said.filter(Boolean))"""

CLIPPED = """(() => {
    const closed = [...document.querySelectorAll('details:not([open])')];
    closed.forEach(one => one.open = true);
    const cut = box => box.scrollWidth > box.clientWidth + 1 && getComputedStyle(box).overflowX != 'visible';
    const root = document.querySelector('article') ?? document.body, found = new Map();
    for (const inner of root.querySelectorAll('pre, table, .cell_output .output')) {
        if (!inner.getClientRects().length) continue;
        for (let box = inner; box && box != root; box = box.parentElement) {
            if (!cut(box)) continue;
            found.set(box, `${inner.tagName.toLowerCase()} "${inner.innerText.trim().slice(0, 40)}" is cut off: `
                + `${box.scrollWidth} px in ${box.clientWidth}`);
            break;
        }
    }
    closed.forEach(one => one.open = false);
    return [...found.values()];
})()"""

EQUATIONS = r"""[...document.querySelectorAll('.math')].flatMap(math => {
    const set = math.querySelectorAll('mjx-container');
    const wrong = math.querySelector('mjx-merror, [data-mjx-error], mjx-mtext[style*="red"]');
    const source = `${set.length ? math.id || [...set].map(one => one.innerText).join() : math.textContent}`.trim();
    if (!set.length) return [`equation ${source} is not set`];
    return wrong ? [`equation ${source} has an error: ${wrong.dataset.mjxError || wrong.textContent}`] : [];
})"""

FAINT = """(least => {
    const pixel = document.createElement('canvas').getContext('2d', {willReadFrequently: true}), known = {};
    const rgba = color => known[color] ??= (() => {
        pixel.clearRect(0, 0, 1, 1); pixel.fillStyle = color; pixel.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = pixel.getImageData(0, 0, 1, 1).data;
        return [r, g, b, a / 255];
    })();
    const over = ([r, g, b, a], below) => [r, g, b].map((part, at) => a * part + (1 - a) * below[at]);
    const kept = of => { const all = new Map(); return node => {
        if (!all.has(node)) all.set(node, of(node));
        return all.get(node);
    } };
    const ground = kept(node => {
        if (!node) return rgba('Canvas').slice(0, 3);
        const own = rgba(getComputedStyle(node).backgroundColor);
        return own[3] == 1 ? own.slice(0, 3) : over(own, ground(node.parentElement));
    });
    const opacity = kept(node => node ? getComputedStyle(node).opacity * opacity(node.parentElement) : 1);
    const light = color => color.map(part => part / 255)
        .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
        .reduce((sum, part, at) => sum + part * [0.2126, 0.7152, 0.0722][at], 0);
    const found = {}, walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let text; text = walker.nextNode();) {
        const node = text.parentElement;
        if (!text.data.trim() || node.closest('script, style, noscript') || !node.getClientRects().length) continue;
        if (!node.checkVisibility({checkOpacity: true, checkVisibilityCSS: true})) continue;
        const below = ground(node), own = rgba(getComputedStyle(node).color);
        const seen = over([...own.slice(0, 3), own[3] * opacity(node)], below);
        const [dim, bright] = [light(seen), light(below)].sort((a, b) => a - b);
        const contrast = (bright + 0.05) / (dim + 0.05);
        const name = `${node.tagName.toLowerCase()}.${node.className} ${node.parentElement.className}`;
        if (contrast < least) found[name] ??= `text "${text.data.trim().slice(0, 30)}" is faint, ${name}: `
            + `contrast ${contrast.toFixed(1)}, rgb ${seen.map(Math.round)} on ${below.map(Math.round)}`;
    }
    return Object.values(found);
})"""


def noise(page: Page, origin: str) -> list[str]:
    """Errors and warnings of the console, exceptions, failed requests, and requests to anybody else."""
    asked = {one["requestId"]: one["request"]["url"] for one in page.said("Network.requestWillBeSent")}
    console = [
        one for one in page.said("Runtime.consoleAPICalled") if one["type"] in ("error", "warning", "assert")
    ]
    answers = [one["response"] for one in page.said("Network.responseReceived")]
    return [
        *(f"exception: {_first_line(one)}" for one in page.said("Runtime.exceptionThrown")),
        *(f"console {one['type']}: {[arg.get('value') for arg in one['args']]}" for one in console),
        *(
            f"log {one['entry']['level']}: {one['entry']['text']}"
            for one in page.said("Log.entryAdded")
            if one["entry"]["level"] in ("error", "warning")
        ),
        *(f"failed: {asked.get(one['requestId'])}" for one in page.said("Network.loadingFailed")),
        *(f"failed: {one['url']} gave {one['status']}" for one in answers if one["status"] >= 400),
        *(f"foreign: {url}" for url in asked.values() if not url.startswith((origin, "data:", "blob:"))),
        *(f"still loading: {asked[one]}" for one in page.pending()),
    ]


def _first_line(thrown: dict) -> str:
    details = thrown["exceptionDetails"]
    return details.get("exception", {}).get("description", details["text"]).splitlines()[0]


def layout(page: Page) -> list[str]:
    """A page wider than the screen, and the innermost things that make it so."""
    wide = page.js("Math.max(document.documentElement.scrollWidth, innerWidth)")
    culprits = f"""[...document.body.querySelectorAll('*')].filter(node =>
        node.getBoundingClientRect().right > {page.width} + 1
        && ![...node.children].some(child => child.getBoundingClientRect().right > {page.width} + 1))
        .slice(0, 3).map(node => node.outerHTML.slice(0, 80))"""
    return (
        [f"page is {wide} px wide on a screen of {page.width}: {page.js(culprits)}"]
        if wide > page.width
        else []
    )


def clipped(page: Page) -> list[str]:
    """Code, output and tables of which a part is cut off, closed ones included; phones may scroll them."""
    return page.js(CLIPPED) if page.width >= WIDE else []


def text(page: Page) -> list[str]:
    """A page that was not ready in time, or whose text cannot be read without a click."""
    shown = page.js("""(main => main.checkVisibility({checkVisibilityCSS: true}) && main.innerText.trim()
        && main.getBoundingClientRect().width / innerWidth)(document.querySelector('article') ?? document.body)""")
    return [
        *(["the page was not ready in time"] if not page.ready else []),
        *(["the text is hidden, empty or narrow"] if not shown or shown < 0.4 else []),
    ]


def pictures(page: Page) -> list[str]:
    """Images that are missing or of one colour."""
    return page.js(PICTURES)


def equations(page: Page) -> list[str]:
    """Equations that were not set, or with an error."""
    return page.js(EQUATIONS)


def faint(page: Page) -> list[str]:
    """Text that hardly differs from its background, one of each kind of element."""
    return page.js(f"{FAINT}({CONTRAST})")


def seen(page: Page, origin: str) -> list[str]:
    """All of these, of the page that is open."""
    parts = (layout, clipped, text, pictures, equations, faint)
    return [*noise(page, origin), *(sentence for part in parts for sentence in part(page))]


class Anchors(HTMLParser):
    """The places of a page that can be led to, and the links and files that it names."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called for each tag."""
        given = dict(attrs)
        self.ids |= {given[name] for name in ("id", "name") if given.get(name)}
        self.links += [given[name] for name in ("href", "src", "action") if given.get(name)]


def broken_links(folder: Path) -> list[str]:
    """Links between the pages of a folder, and to places in them, that lead nowhere."""
    pages = {path: Anchors(path) for path in sorted(folder.rglob("*.html")) if "_static" not in path.parts}
    found = []
    for path, page in pages.items():
        for link in page.links:
            if urlsplit(link).scheme or link.startswith("//"):
                continue
            address, place = urldefrag(urljoin(path.as_uri(), link))
            target = Path(unquote(urlsplit(address).path))
            if not target.is_file() or folder not in target.parents:
                found.append(f"{path.relative_to(folder)}: {link} leads to no file")
            elif place and target in pages and unquote(place) not in pages[target].ids:
                found.append(f"{path.relative_to(folder)}: {link} leads to no place on that page")
    return found
