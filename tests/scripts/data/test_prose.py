"""Prose stays; markup, code, tables and other languages go."""

from scripts.data.prose import ENGLISH, GERMAN, html_text, plain_text, pod_text, prose_of

SENTENCE = "This is the number {} of the sentences that are long enough to be taken for prose in the test."
PROSE = (
    "Ein Verzeichnisname wird in der Schrift einer\n    Schreibmaschine zwischen doppelten Zeichen dargestellt und "
    "ist damit\n    leicht von dem übrigen Text zu unterscheiden."
)


def test_prose_stays_and_code_tables_and_english_go() -> None:
    english = "This paragraph is long enough to be kept, but there is not one word of German in all of it."
    book = "\n\n".join(["$ mc /etc/apt/", f"    {PROSE}", "| der | die | das |", english, "Kurz ist der Satz.", PROSE])
    assert prose_of(book, GERMAN) == " ".join(PROSE.split())
    assert prose_of("", GERMAN) == ""


def test_pod_loses_commands_code_and_codes() -> None:
    source = (
        "=head1 NAME\n\nThe C<open> function is in L<the manual|perlfunc>, see B<I<both> of\nthem> and "
        "C<< a -> b >>.\n\n"
        "    my $code = 1;\n\nE<lt>STDINE<gt> is a file.\n"
    )
    assert pod_text(source) == (
        "The open function is in perlfunc, see both of\nthem and a -> b.\n\n<STDIN> is a file.\n"
    )


def test_html_keeps_paragraphs_apart_and_loses_what_is_preformatted() -> None:
    source = "<style>p {}</style><h1>Title</h1><p>One &amp;\n two <code>x</code>.</p><pre>code</pre><li>Item."
    assert html_text(source).split("\n\n") == ["", "", "Title", "", "One &\n two x.", "", "", "Item."]
    assert prose_of(html_text(f"<p>{SENTENCE.format(1)}</p>"), ENGLISH) == SENTENCE.format(1)


def test_plain_text_is_left_alone() -> None:
    assert plain_text("a\n\n b") == "a\n\n b"
