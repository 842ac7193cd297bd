"""What analyze.py hands over: text and tables on the terminal, pictures in a folder, and a page of both."""
import base64
import html

from minq.errors import UserError


class Report:
    """Text and tables on the terminal, pictures in a folder, and all of it once more as a page that stands alone.

    Without matplotlib there are no pictures, and `close` says how to get them.
    """

    def __init__(self, folder):
        self.folder, self.parts, self.drawn = folder, [], []
        try:
            from minq import figures
        except ImportError:
            figures = None
        self.figures = figures

    def heading(self, text):
        print(f"\n{text}\n")
        self.parts.append(f"<h2>{html.escape(text)}</h2>")

    def say(self, text):
        print(text)
        self.parts.append(f"<p>{html.escape(text).replace(chr(10), '<br>')}</p>")

    def table(self, header, rows):
        """In Markdown, as quantize.py prints them."""
        lines = [header, ["---"] * len(header), *rows]
        print("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n")
        cells = [[f"<td>{html.escape(str(cell))}</td>" for cell in line] for line in (header, *rows)]
        self.parts.append("<table>" + "".join(f"<tr>{''.join(line)}</tr>\n" for line in cells) + "</table>")

    def draw(self, name, caption, make):
        """Save the Figure that `make(figures)` returns as name.png."""
        if self.figures is None:
            return
        png = self.figures.png(make(self.figures))
        self.write(f"{name}.png", png)
        source = base64.b64encode(png).decode()
        self.parts.append(f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{source}">'
                          f"<figcaption>{html.escape(caption)}</figcaption></figure>")

    def write(self, name, content):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(content)
        except OSError as error:
            raise UserError(f"--out {self.folder}: cannot be written: {error.strerror}") from None
        self.drawn.append(name)

    def write_page(self, title, command):
        """analysis.html, with the command that made it."""
        title, command, body = html.escape(title), html.escape(command), "\n".join(self.parts)
        self.write("analysis.html", PAGE.format(title=title, command=command, body=body).encode())

    def close(self):
        if self.figures is None:
            print("no pictures: matplotlib is missing; get it with: pip install -e '.[plots]'")
        if self.drawn:
            print(f"in {self.folder}: {' '.join(self.drawn)}")


PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ max-width: 70rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif; }}
table {{ border-collapse: collapse; font-size: 0.9rem; }}
td {{ padding: 0.1rem 0.7rem; border-bottom: 1px solid #ccc; text-align: right; }}
tr:first-child {{ font-weight: bold; }}
img {{ max-width: 100%; }}
figure {{ margin: 1.5rem 0; }}
figcaption {{ color: #444; }}
</style>
<h1>{title}</h1>
<p>Made by <code>{command}</code></p>
{body}
</html>
"""
